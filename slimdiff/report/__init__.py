"""What a benchmark says and how it looks: results as text and JSON, one page of HTML, its plots, its wording."""
