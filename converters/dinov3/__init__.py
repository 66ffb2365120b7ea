"""DINOv3 at the border: official names and buffers, the names and settings of `transformers`, and the terms."""
