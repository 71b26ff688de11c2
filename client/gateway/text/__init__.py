"""Between text and tokens: templates, stop strings, tool calls, grammars."""
