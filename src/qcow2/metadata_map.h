#pragma once
// Which host clusters hold metadata, so that nothing else is ever written there.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "qcow2/core.h"

namespace qcow::qcow2 {

/// Header, L1, L2 and refcount tables, refcount blocks, snapshot and bitmap tables: all that an image's header leads
/// to. Memory: some tens of bytes a cluster of metadata, whose number the limits on L1 and refcount table bound.
/// Thread-safe; to ask about a cluster that holds none takes no lock.
class MetadataMap {
public:
    enum class Kind : std::uint8_t {
        header,
        l1_table,
        l2_table,
        refcount_table,
        refcount_block,
        snapshots,
        bitmaps,
        encryption
    };

    explicit MetadataMap(unsigned cluster_bits) : cluster_bits_(cluster_bits), filter_(filter_words) {}

    /// All that an image has. Errc::corrupt where structures overlap or do not lie within the file.
    Result<void> load(const Core& core);

    /// Adds the clusters that [at, at + length) touches. Errc::corrupt, naming both, where one is in use already.
    Result<void> add(HostOffset at, std::uint64_t length, Kind kind);
    void remove(HostOffset at, std::uint64_t length);

    /// The first metadata in [at, at + length), as words for a message; empty: none.
    [[nodiscard]] std::string_view find(HostOffset at, std::uint64_t length) const;

private:
    static constexpr std::size_t filter_words = 16384;  // a million bits

    [[nodiscard]] static std::uint64_t hash(std::uint64_t cluster) { return cluster * 0x9e3779b97f4a7c15 >> 44; }

    unsigned cluster_bits_;
    std::vector<std::atomic<std::uint64_t>> filter_;  // a bit for each hash of a cluster that was ever added
    mutable std::mutex mutex_;
    std::unordered_map<std::uint64_t, Kind> kinds_;
};

}  // namespace qcow::qcow2
