"""What an evaluation found: as numbers, tables, figures and a page."""
