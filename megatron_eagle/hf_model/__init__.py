"""Shipped with every export; imports only itself, torch, transformers, numpy, Pillow, av; its plugin: vLLM"""
