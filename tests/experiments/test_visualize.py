"""What is drawn is what the model computes; figures in which nothing overlaps; mistakes as one sentence."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig, maps
from dinojax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from experiments import visualize
from experiments.features.backbones import find_network, load_backbone
from experiments.figures import maps as map_figures
from experiments.figures.clicking import await_click
from experiments.runs.settings import create
from experiments.visualize import Config

REPOSITORY = Path(__file__).parents[2]
TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
REGISTERED = ViTConfig(
    img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, init_values=0.5, num_register_tokens=4
)
OWN = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.2]}
FIGURES = ("attention", "mask", "similarity")


def picture(height, width, seed=0):
    """Smooth colours, so that patches differ as those of photographs do."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with registers, the run folder of a training, and images of two sizes."""
    place = tmp_path_factory.mktemp("visualize")
    dinojax.save(VisionTransformer(REGISTERED, rngs=nnx.Rngs(0)), place / "model")
    for seed, network in enumerate(("teacher", "student")):
        model = VisionTransformer(TINY, rngs=nnx.Rngs(seed), preprocessing=Preprocessing(**OWN))
        dinojax.save(model, place / "run" / network)
    (place / "run" / "config.json").write_text("{}")
    (place / "images" / "deep").mkdir(parents=True)
    picture(23, 34).save(place / "images" / "wide.png")
    picture(20, 16, seed=1).save(place / "images" / "deep" / "tall.jpg")
    return place


def config(place, *images, weights="model", **changes):
    options = {"out": place / "out", "cache_dir": place / "cache", "save_arrays": True, **changes}
    return create(Config, weights=str(place / weights), images=images, **options)


def truth(model, pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Attention of the class token (the mean first) and patch features, from the model's raw outputs."""
    patch, registers = model.config.patch_size, model.config.num_register_tokens
    rows, columns = (side // patch for side in pixels.shape[:2])
    pixels = pixels[: rows * patch, : columns * patch]
    images = ((pixels / 255 - np.array(mean)) / np.array(std)).astype(np.float32)[None]
    heads = np.asarray(model.get_last_selfattention(images))[0, :, 0, 1 + registers :].reshape(-1, rows, columns)
    features = np.asarray(model.get_intermediate_layers(images, reshape=True)[0][0])
    return np.concatenate([heads.mean(0, keepdims=True), heads]), features


def test_figures_and_arrays_of_images_of_any_size(place, tmp_path, capsys):
    written = visualize.run(config(place, place / "images", out=tmp_path / "out", point=(9, 14), threshold=0.9))
    names = [f"{name}_{kind}.png" for name in ("wide", "tall") for kind in FIGURES]
    files = {*names, "wide.npz", "tall.npz", "pca.png", "sheet.png", "config.json"}
    assert {path.name for path in written} == files == {path.name for path in (tmp_path / "out").iterdir()}
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'wide'}_{{attention,mask,similarity}}.png   {place / 'images' / 'wide.png'}" in said
    wide = f"{place / 'images' / 'wide.png'} from 34×23 to 32×20 px"
    assert f"note: 1 of 2 images are cut to whole patches of 4 px, for example {wide}" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["point"] == [9, 14]
    model = dinojax.load(place / "model")
    found = {name: np.load(tmp_path / "out" / f"{name}.npz") for name in ("wide", "tall")}
    for name, file in (("wide", "wide.png"), ("tall", "deep/tall.jpg")):
        attention, features = truth(model, np.asarray(Image.open(place / "images" / file)))
        np.testing.assert_allclose(found[name]["attention"], attention, atol=1e-6)
        np.testing.assert_array_equal(found[name]["score_mask"], maps.score_mask(found[name]["attention"], 0.9))
        np.testing.assert_array_equal(found[name]["mass_mask"], maps.mass_mask(found[name]["attention"], 0.6))
        np.testing.assert_allclose(
            found[name]["similarity"], maps.patch_similarity(features, features[3, 2]), atol=1e-5
        )
    assert found["wide"]["attention"].shape == (4, 5, 8) and found["tall"]["attention"].shape == (4, 5, 4)
    colours = maps.pca_maps([truth(model, np.asarray(Image.open(place / "images" / file)))[1]
                             for file in ("deep/tall.jpg", "wide.png")])  # fmt: skip
    for name, one in zip(("tall", "wide"), colours):
        np.testing.assert_array_equal(found[name]["pca_foreground"], one.foreground)
        np.testing.assert_allclose(found[name]["pca"], one.rgb, atol=1e-4)
    for path in tmp_path.glob("out/*.png"):
        drawn = np.asarray(Image.open(path).convert("L"))
        assert min(drawn.shape) > 300 and drawn.std() > 10, path


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_run_folder_gives_its_networks_with_their_own_normalisation(place, tmp_path, network):
    image = place / "images" / "wide.png"
    visualize.run(config(place, image, weights="run", network=network, out=tmp_path / "out"))
    attention, _ = truth(dinojax.load(place / "run" / network), np.asarray(Image.open(image)), **OWN)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "wide.npz")["attention"], attention, atol=1e-6)


def test_networks_and_normalisation_are_found(place, tmp_path):
    assert find_network(str(place / "run"), "student") == str(place / "run" / "student")
    for weights in ("dino_vits16", "random:dino_vitt16", str(place / "model"), str(place / "run" / "teacher")):
        assert find_network(weights, "teacher") == weights
    for weights, expected in (("run/teacher", (OWN["mean"], OWN["std"])), ("model", (IMAGENET_MEAN, IMAGENET_STD))):
        found = load_backbone(str(place / weights), seed=0, cache_dir=tmp_path).normalisation
        assert found == tuple(map(tuple, expected))
    shutil.copytree(place / "run" / "teacher", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"--network student: .* holds no model of that name, only teacher"):
        find_network(str(tmp_path), "student")


def test_the_shorter_side_becomes_the_image_size_and_the_rest_is_cut_off_right_and_below(place):
    image = Image.open(place / "images" / "wide.png")
    (shown,) = visualize._pictures({place / "images" / "wide.png": (23, 34)}, 30, None, 4)
    assert shown.resized == (30, int(30 * 34 / 23)) and shown.size == (28, 44)
    resized = np.asarray(image.resize((44, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(shown.read(), resized[:28, :44])


def test_bfloat16_is_near_float32(place, tmp_path):
    image = place / "images" / "wide.png"
    for dtype in ("float32", "bfloat16"):
        visualize.run(config(place, image, dtype=dtype, out=tmp_path / dtype))
    full, half = (np.load(tmp_path / dtype / "wide.npz") for dtype in ("float32", "bfloat16"))
    difference = np.abs(full["attention"] - half["attention"]).max() / full["attention"].max()
    assert 0 < difference < 0.006  # 0.0027 measured


def test_images_of_one_name_get_files_of_their_own():
    sizes = dict.fromkeys(map(Path, ("a/x.png", "b/x.jpg", "b/x_2.jpg", "c/X.png")), (8, 8))
    names = [picture.name for picture in visualize._pictures(sizes, None, None, 4)]
    assert names == ["x", "x_2", "x_2_2", "X_3"]


def test_many_images_get_pages_of_pca_and_sheets(place, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "_PER_PAGE", 1)
    monkeypatch.setattr(visualize, "_PER_SHEET", 1)
    visualize.run(config(place, place / "images", out=tmp_path / "out", save_arrays=False, foreground=None))
    pages = {path.name for path in (tmp_path / "out").glob("*.png") if not path.name.startswith(("wide", "tall"))}
    assert pages == {"pca.png", "pca_2.png", "sheet.png", "sheet_2.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images were given"),
        (["missing.jpg"], "missing.jpg: there is no such image or folder"),
        (["empty"], "empty holds no images"),
        (["small.png"], "small.png at 5×3 px is smaller than one patch of 4 px; pass --image-size 56"),
        (["wide.png", "--image-size", "3"], "wide.png at 4×3 px is smaller than one patch of 4 px"),
        (["wide.png", "--point", "32", "3"], "--point 32 3 is outside wide.png, which is shown at 32×20 px"),
        (["wide.png", "--point", "3", "-1"], "--point 3 -1 is outside wide.png"),
        (["wide.png", "--mass", "0"], "--mass 0.0 is not above 0 and up to 1"),
        (["wide.png", "--mass", "1.1"], "--mass 1.1 is not above 0 and up to 1"),
        (["wide.png", "--threshold", "nan"], "--threshold nan is not between 0 and 1"),
        (["wide.png", "--foreground", "1"], "--foreground 1.0 is not 0 or more and below 1"),
        (["wide.png", "--image-size", "0"], "--image-size 0 is not a positive number"),
        (["wide.png", "--network", "student"], "is not the run folder of a training"),
        (["huge.png"], "huge.png at 4400×4400 px has 1,210,000 patches, whose attention takes"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    picture(3, 5).save(tmp_path / "small.png")
    shutil.copy(place / "images" / "wide.png", tmp_path)
    if "huge.png" in arguments:
        Image.new("RGB", (4400, 4400)).save(tmp_path / "huge.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(place / "model"), *arguments, "--out", "out", "--cache-dir", "cache"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_features_that_are_not_finite_are_refused(place, tmp_path):
    model = dinojax.load(place / "model")
    model.norm.bias[...] = model.norm.bias[...].at[0].set(np.nan)
    dinojax.save(model, tmp_path / "nan")
    with pytest.raises(UserError, match=r"the features of .*wide\.png are not finite"):
        visualize.run(config(place, place / "images" / "wide.png", weights=tmp_path / "nan", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_the_colours_of_attention_range_over_its_percentiles(tmp_path, monkeypatch):
    """Nearly uniform attention, as models have it: from 0 to the maximum, one colour would be all that is seen."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    attention = 0.01 + 1e-4 * np.random.default_rng(0).random((3, 5, 7)).astype(np.float32)
    pixels = np.asarray(picture(20, 28))
    map_figures.save_attention(tmp_path, pixels, attention, title="a title", note="a note")
    (figure,) = figures
    panels = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    texts = [text.get_text() for text in figure.texts]
    for panel, values in zip(panels, attention, strict=True):
        low, high = np.quantile(values.astype(float), [0.01, 0.99])
        assert panel.get_clim() == pytest.approx((low, high))
        assert f"{100 * low:.2g}–{100 * high:.2g} %" in texts
        shown = panel.to_rgba(values)
        assert np.ptp(shown[..., :3], axis=(0, 1)).max() > 0.9


@pytest.mark.parametrize(("height", "width"), [(32, 320), (48, 40), (320, 32)])
@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.slow  # draws every figure
def test_nothing_in_a_figure_overlaps_and_images_keep_their_aspect(tmp_path, monkeypatch, height, width, heads):
    figures = []
    monkeypatch.setattr(map_figures, "save_figure", lambda figure, path: figures.append(figure))
    rng, grid = np.random.default_rng(0), (height // 8, width // 8)
    pixels, attention = np.asarray(picture(height, width)), rng.random((1 + heads, *grid)) / 300
    text = {"title": "A long title " * 20, "note": "and a long note " * 20}
    map_figures.save_attention(tmp_path, pixels, attention, **text)
    masks = {heading: maps.score_mask(attention, 0.5) for heading in ("a heading", "another heading")}
    map_figures.save_masks(tmp_path, pixels, masks, **text)
    map_figures.save_similarity(tmp_path, pixels, attention[0], (2, 3), **text)
    pca = maps.pca_maps([rng.random((*grid, 4)).astype(np.float32)])
    map_figures.save_pca(tmp_path, [pixels] * 5, pca * 5, ["a very long name of an image"] * 5, **text)
    row = map_figures.SheetRow(
        pixels, "a very long name of an image", attention[0], masks["a heading"][0], attention[0], *pca
    )
    map_figures.save_contact_sheet(tmp_path, [row] * 3, **text)
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        panels = [axes for axes in figure.axes if axes.images]
        boxes = [label.get_window_extent() for label in figure.texts if label.get_text()]
        boxes += [axes.get_window_extent() for axes in figure.axes]
        inside = figure.bbox.padded(1)
        assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        for axes in panels:
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(width / height, rel=1e-9)


def test_heads_are_told_apart():
    labels = list(map_figures._labels(25))
    assert [name for name, _ in labels] == ["mean", *(f"head {i}" for i in range(1, 25))]
    for (_, one), (_, other) in itertools.pairwise(labels):
        assert np.linalg.norm(np.subtract(one, other)) > 0.15
    luminance = [color @ np.array([0.2126, 0.7152, 0.0722]) for _, color in labels]
    assert max(luminance) < 0.6  # readable on white


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys, runpy\nsys.argv = ['visualize', '--help']\n"
        "try: runpy.run_module('experiments.visualize', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'tensorflow', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "loaded: []" in done.stdout
    for word in ("RUN_OR_WEIGHTS", "IMAGES", "--threshold", "--mass", "--point", "--network", "photo.jpg"):
        assert word in done.stdout


def test_a_click_names_the_point(monkeypatch):
    """What a mouse does to a window, done to a canvas without one."""
    pixels, figure = np.asarray(picture(20, 30)), Figure()
    canvas = FigureCanvasAgg(figure)

    def click_on(x, y):
        where = figure.axes[0].transData.transform((x, y))
        MouseEvent("button_press_event", canvas, *where, button=1)._process()

    monkeypatch.setattr(canvas, "flush_events", lambda: click_on(21.3, 6.8))
    assert await_click(figure, pixels, "a picture") == (21, 7)


def test_without_a_display_there_is_no_click(place):
    with pytest.raises(UserError, match=r"--click needs a display.*--point X Y"):
        visualize.run(config(place, place / "images" / "wide.png", click=True))
    assert not (place / "out").exists()
