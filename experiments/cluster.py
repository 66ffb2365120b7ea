"""Clusters of the images of an embedding file, without labels.

    python -m experiments.cluster features.parquet
    python -m experiments.cluster features.parquet --k 12 --method agglomerative --root new/place/of/the/images

The features are scaled to length 1 and clustered by scikit-learn. With --k auto, the number of clusters is the one with
the largest mean silhouette on at most 2,000 images. Clusters are numbered from 0, the largest first.

The output folder gets clusters.csv with the cluster of every image, clusters.html with thumbnails (one file that needs
no network), clusters.png with a row for each cluster, cluster_00.png and so on with more images of each,
clusters.json with numbers and sizes, and config.json. The first images of a cluster are those nearest to its mean.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from dinojax.commands import exit_on_user_error
from experiments.gallery.bank import Bank, OutputSettings, TableSettings, open_bank
from experiments.gallery.clustering import Clusters, Method, find_clusters
from experiments.runs.command_line import command_line
from experiments.runs.settings import Bound, Flags, check_bounds, flat, require

_ON_PAGE, _PER_CLUSTER, _PER_SHEET, _PER_ROW = 1500, 24, 48, 8  # images
_SHEETS, _ROWS = 100, 40  # clusters
_CLUSTERS = Bound(lambda value: value == "auto" or value >= 2, "auto, or 2 or more")


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """The clusters."""

    k: Annotated[int | Literal["auto"], _CLUSTERS] = "auto"
    """Number of clusters. auto selects it by silhouette."""
    k_max: Annotated[int, Bound(lambda value: value >= 2, "2 or more")] = 20
    """Largest number of clusters that --k auto tries."""
    method: Method = "kmeans"
    """Method of clustering. agglomerative joins the two clusters that grow least in variance (Ward), and is for at most
    20,000 images."""
    seed: int = 0
    """Random seed of the starts of k-means, and of the images that --k auto looks at."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Clusters of the images of an embedding file."""

    bank: Flags[TableSettings]
    clusters: Flags[ClusterSettings] = ClusterSettings()
    output: Flags[OutputSettings] = OutputSettings()


def run(config: Config) -> Clusters:
    """Finds the clusters, and writes and draws them.

    Raises:
        UserError: an embedding file that cannot be used, or a number of clusters that its images do not form.
    """
    from experiments.runs import records

    check_bounds(config)
    bank, asked = open_bank(config.bank), config.clusters
    k = None if asked.k == "auto" else asked.k
    if k is not None:
        require(k <= len(bank), "k", k, f"at most the {len(bank):,} images of {bank.table}")
    out = config.output.out or records.default_run_folder("cluster")
    with records.run_folder(out) as folder:
        found = find_clusters(bank.unit(), k, most=asked.k_max, method=asked.method, seed=asked.seed)
        _write_csv(folder / "clusters.csv", bank, found)
        records.write_json(folder / "clusters.json", _numbers(found))
        records.write_json(folder / records.CONFIG_FILE, flat(config))
    with records.run_folder(out) as folder:
        _draw(folder, bank, found, asked.method)
    _print(bank, found, out, asked.method)
    return found


def _numbers(found: Clusters) -> dict[str, Any]:
    silhouettes = {str(k): round(value, 6) for k, value in found.silhouettes.items()}
    return {"clusters": len(found.sizes), "sizes": found.sizes.tolist(), "silhouette_by_k": silhouettes}


def _write_csv(path: Path, bank: Bank, found: Clusters) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "cluster", "similarity_to_mean"))
        for image, name in enumerate(bank.paths):
            writer.writerow((name, found.labels[image], f"{found.similarity[image]:.6f}"))


def _draw(folder: Path, bank: Bank, found: Clusters, method: str) -> None:
    """Writes the page, the overview and a sheet of each cluster."""
    from experiments.data.files import readable_name
    from experiments.figures.sheets import Band, Cell, save_sheet
    from experiments.gallery.page import Card, Section, render_page
    from experiments.gallery.thumbnails import thumbnails

    count = len(found.sizes)
    members = [found.members(cluster)[:_PER_SHEET] for cluster in range(count)]
    per_cluster = max(1, min(_PER_CLUSTER, _ON_PAGE // count))
    note = f"{_summary(bank, found, method)}; {bank.about}"
    sections, bands = [], []
    for cluster, shown in enumerate(members):
        images = thumbnails(bank.files(shown if cluster < _SHEETS else shown[:per_cluster]))
        cards = [Card(images.get(i), f"{found.similarity[i]:.3f}", bank.paths[i]) for i in shown]
        heading = f"Cluster {cluster}: {found.sizes[cluster]:,} images"
        left = "The nearest to the mean of the cluster." if found.sizes[cluster] > per_cluster else ""
        sections.append(Section(heading, f"{cluster} ({found.sizes[cluster]:,})", cards[:per_cluster], left))
        cells = [Cell(card.thumbnail, card.heading, card.name) for card in cards]
        bands.append(Band(heading, cells[:_PER_ROW]))
        if cluster < _SHEETS:
            save_sheet(folder / f"cluster_{cluster:02}.png", [Band("", cells)], title=heading, note=note)
    about = [_summary(bank, found, method), f"{readable_name(bank.table)}; {bank.about}"]
    about.append("Below each image: its cosine similarity to the mean of its cluster. clusters.csv lists all images.")
    (folder / "clusters.html").write_text(render_page("Clusters", about, sections), encoding="utf-8")
    save_sheet(folder / "clusters.png", bands[:_ROWS], title="Clusters", note=note)


def _summary(bank: Bank, found: Clusters, method: str) -> str:
    count = len(found.sizes)
    how = f" (silhouette {found.silhouettes[count]:.3f}, the largest)" if found.silhouettes else ""
    return f"{len(bank):,} images in {count} clusters{how} by {'k-means' if method == 'kmeans' else method} clustering"


def _print(bank: Bank, found: Clusters, out: Path, method: str) -> None:
    """Prints the silhouettes and the clusters."""
    print(f"\n{bank.about}\n{_summary(bank, found, method)}\n")
    if found.silhouettes:
        print("  clusters  silhouette")
        for k, value in found.silhouettes.items():
            print(f"  {k:8}  {value:10.3f}{'   chosen' if k == len(found.sizes) else ''}")
        print()
    print("   cluster  images  nearest to the mean")
    for cluster, size in enumerate(found.sizes):
        print(f"  {cluster:8}  {size:6,}  {bank.paths[found.members(cluster)[0]]}")
    print()
    for name in ("clusters.csv", "clusters.html", "clusters.png"):
        print(f"  {out / name}")
    print(f"  {out}/cluster_00.png and so on")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.cluster", __doc__, args))


if __name__ == "__main__":
    main()
