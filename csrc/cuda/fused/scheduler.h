// The order in which tiles of a matrix are computed.
#pragma once

#include <cstdint>

#include "unitsface/macros.h"

namespace unitsface::cuda {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 128;

// Position of a tile, and how many of its rows and columns are inside the matrix.
struct Tile {
  int row_block, column_block;
  int rows, columns;

  UF_HOST_DEVICE int64_t row() const { return static_cast<int64_t>(row_block) * kTileRows; }
  UF_HOST_DEVICE int64_t column() const {
    return static_cast<int64_t>(column_block) * kTileColumns;
  }
};

// A group of row tiles passes through all columns before the next group starts: tiles that are
// computed at the same time share their columns, and a group's rows stay in L2.
struct TileOrder {
  static constexpr int kGroup = 8;

  int64_t n, m;
  int row_tiles, column_tiles;

  // Fewer than 2^31 tiles.
  UF_HOST_DEVICE TileOrder(int64_t rows, int64_t columns)
      : n(rows),
        m(columns),
        row_tiles(static_cast<int>((rows + kTileRows - 1) / kTileRows)),
        column_tiles(static_cast<int>((columns + kTileColumns - 1) / kTileColumns)) {}

  UF_HOST_DEVICE int64_t tiles() const { return static_cast<int64_t>(row_tiles) * column_tiles; }

  UF_HOST_DEVICE Tile at(unsigned index) const {
    const unsigned columns = static_cast<unsigned>(column_tiles);
    const unsigned first = index / columns / kGroup * kGroup;
    const unsigned left = static_cast<unsigned>(row_tiles) - first;
    const unsigned height = left < kGroup ? left : kGroup;
    const unsigned place = index - first * columns;
    return of(static_cast<int>(first + place % height), static_cast<int>(place / height));
  }

  UF_HOST_DEVICE Tile of(int row_block, int column_block) const {
    Tile tile{row_block, column_block, kTileRows, kTileColumns};
    if (n - tile.row() < kTileRows) tile.rows = static_cast<int>(n - tile.row());
    if (m - tile.column() < kTileColumns) tile.columns = static_cast<int>(m - tile.column());
    return tile;
  }
};

}  // namespace unitsface::cuda
