// The order in which tiles of a matrix are computed.
#pragma once

#include <cstdint>

#include "unitsface/macros.h"

namespace unitsface::cuda {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 128;

// Position of a tile, and how many of its rows and columns are inside the matrix.
struct Tile {
  int64_t row_block, column_block;
  int64_t row, column;  // first of each
  int rows, columns;
};

// A group of row tiles passes through all columns before the next group starts: tiles that are
// computed at the same time share their columns, and a group's rows stay in L2.
struct TileOrder {
  static constexpr int64_t kGroup = 8;

  int64_t n, m, row_tiles, column_tiles;

  UF_HOST_DEVICE TileOrder(int64_t rows, int64_t columns)
      : n(rows),
        m(columns),
        row_tiles((rows + kTileRows - 1) / kTileRows),
        column_tiles((columns + kTileColumns - 1) / kTileColumns) {}

  UF_HOST_DEVICE int64_t tiles() const { return row_tiles * column_tiles; }

  UF_HOST_DEVICE Tile at(int64_t index) const {
    const int64_t group = index / (kGroup * column_tiles);
    const int64_t first = group * kGroup;
    const int64_t height = row_tiles - first < kGroup ? row_tiles - first : kGroup;
    const int64_t place = index - first * column_tiles;
    return of(first + place % height, place / height);
  }

  UF_HOST_DEVICE Tile of(int64_t row_block, int64_t column_block) const {
    Tile tile;
    tile.row_block = row_block, tile.column_block = column_block;
    tile.row = row_block * kTileRows, tile.column = column_block * kTileColumns;
    tile.rows = static_cast<int>(n - tile.row < kTileRows ? n - tile.row : kTileRows);
    tile.columns =
        static_cast<int>(m - tile.column < kTileColumns ? m - tile.column : kTileColumns);
    return tile;
  }
};

}  // namespace unitsface::cuda
