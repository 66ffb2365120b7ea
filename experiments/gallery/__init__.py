"""What the commands that show images of an embedding file share: the bank, thumbnails, and a page of them."""
