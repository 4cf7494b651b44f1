"""Files shipped with every export; they import only torch, transformers, numpy, Pillow and av (videos)."""
