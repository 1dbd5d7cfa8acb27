"""What only the command line needs: rules as text, and models drawn without their weights."""
