"""What a training needs besides a model: hooks and learning rates by depth."""
