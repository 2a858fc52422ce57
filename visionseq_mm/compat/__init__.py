"""The only place that touches other packages.

Importing it imports neither torch nor mmengine, because ``autoload`` runs in
every ``import torch`` of the environment.
"""
