"""The page: drawing, regions, redrawing, comparing and distilling in a browser; it knows neither tiles nor gradients."""
