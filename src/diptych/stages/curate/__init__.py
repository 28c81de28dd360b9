"""Stage 3, curate: grids are cut, panels screened and compared, and every ordered pair gets its verdict."""
