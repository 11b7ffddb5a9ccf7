"""Where pictures come from: prepared data sets on disk, brought to one size, handed out as a function of the step."""
