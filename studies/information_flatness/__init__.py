"""Does mutual information between layers say what they share, or how flat their gates are? (docs/analysis.md)"""
