"""Adaptive sparse anchors (ASAG): as many anchors as the image needs, from its content alone."""
