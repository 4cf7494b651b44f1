"""The commands of `megatron-eagle`, a module each: what they take, and what they print."""
