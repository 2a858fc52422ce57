"""Being here puts this folder on ``sys.path``, for the helpers that several folders share."""
