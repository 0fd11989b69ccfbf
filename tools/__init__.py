"""What checks rather than measures; each tool has a README.md."""
