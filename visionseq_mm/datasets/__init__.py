"""Data sets of mmdet and mmseg that say what is wrong with the data before a training begins."""
