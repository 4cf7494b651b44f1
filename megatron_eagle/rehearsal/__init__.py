"""A whole cluster's step on a CPU: its distinct ranks, with tensors that have shapes and no data"""
