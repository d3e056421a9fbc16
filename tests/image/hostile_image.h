#pragma once
// Images that mean harm, written by hand: every field is whatever a test wants it to be.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "format/entries.h"
#include "format/header.h"
#include "fuzz/sparse_files.h"

namespace qcow::hostile {

using Bytes = std::vector<std::byte>;

void append(Bytes& out, std::uint64_t value, unsigned bytes);
void append(Bytes& out, std::string_view text);

struct Extension {
    std::uint32_t type = 0;
    Bytes data;
};

/// Header and lay-out of an image whose clusters are, unless a test moves them: 0 header, 1 refcount table, 2 refcount
/// block, 3 L1 table.
struct HostileImage {
    std::uint32_t version = 3;
    std::uint32_t cluster_bits = 16;
    std::uint64_t size = MiB;
    std::uint32_t crypt = 0;
    std::uint32_t l1_entries = 1;
    std::uint64_t l1_table = 3;        // clusters
    std::uint64_t refcount_table = 1;  // clusters
    std::uint32_t refcount_table_clusters = 1;
    std::uint32_t snapshots = 0;
    std::uint64_t snapshot_table = 0;  // clusters
    std::uint64_t incompatible = 0;
    std::uint64_t autoclear = 0;
    std::uint32_t refcount_order = 4;
    bool zstd = false;
    std::string backing_name;
    std::vector<Extension> extensions;

    fuzz::SparseFile file;

    HostileImage() = default;
    explicit HostileImage(unsigned bits) : cluster_bits(bits) {}

    [[nodiscard]] std::uint64_t cluster(std::uint64_t n) const { return n << cluster_bits; }

    void fill(std::uint64_t at, std::uint64_t words, std::uint64_t word);

    /// One refcount block, 1 for each of the first `clusters` clusters.
    void write_refcounts(std::uint64_t clusters);

    /// Writes the header in front of what the test has written, and gives the whole file, at least `clusters` long.
    fuzz::SparseFile finish(std::uint64_t clusters = 4);

    void set_backing_format(std::string_view name);
};

}  // namespace qcow::hostile
