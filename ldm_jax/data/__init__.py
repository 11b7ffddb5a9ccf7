"""Image data sets prepared on disk, brought to one size, and read in batches that are a function of the step."""
