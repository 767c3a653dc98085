"""The study `recall`: why some layouts learn the recipe `recall`, and when, in two frameworks."""
