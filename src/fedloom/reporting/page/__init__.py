"""The report's page: parts, sections, style and script."""
