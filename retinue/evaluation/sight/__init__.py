"""Views of what a net looks at: receptive fields, attention, class activation, and statistics of features by depth."""
