"""From factories to a checked plan to one ``update_modules``, and back again at a block's end."""
