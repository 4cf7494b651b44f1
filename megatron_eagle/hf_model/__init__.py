"""Files shipped with every export; they import only each other, torch, transformers, numpy, Pillow and av."""
