"""Is what is served what was trained? Samples through every path, to the first difference"""
