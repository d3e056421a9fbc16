#pragma once
// Which host clusters hold metadata, so that nothing else is ever written there.

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

/// Header, L1, L2 and refcount tables, refcount blocks, snapshot and bitmap tables: all that an image's header leads
/// to. Memory: some tens of bytes for each run of clusters of one kind, however long, of which an image may
/// come with max_runs.
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

    /// L1 and refcount tables of the largest size lead to five million clusters; the rest is for snapshots and bitmaps.
    static constexpr std::size_t max_runs = 6'000'000;

    explicit MetadataMap(unsigned cluster_bits) : cluster_bits_(cluster_bits), filter_(filter_words) {}

    /// All that an image has, in place of what was added before. Errc::corrupt where structures overlap or do not lie
    /// within the file; limit_exceeded where there are more, or larger ones, than images have in practice. Holes are
    /// not read.
    Result<void> load(const Metadata& metadata);

    /// Adds the clusters that [at, at + length) touches. Errc::corrupt, naming both, where one is in use already:
    /// nothing is added then.
    Result<void> add(HostOffset at, std::uint64_t length, Kind kind);
    void remove(HostOffset at, std::uint64_t length);

    /// The cluster behind the last one that holds metadata.
    [[nodiscard]] std::uint64_t end() const;

    /// The first metadata in [at, at + length), as words for a message; empty: none.
    [[nodiscard]] std::string_view find(HostOffset at, std::uint64_t length) const;

private:
    class Loader;

    struct Run {
        std::uint64_t end = 0;  // cluster behind it
        Kind kind = {};
    };
    using Runs = std::map<std::uint64_t, Run>;  // by their first clusters; they do not overlap

    static constexpr std::size_t filter_words = 16384;  // a million bits
    /// Of a run that is longer, the filter has one bit for so many clusters.
    static constexpr unsigned chunk_bits = 8;

    [[nodiscard]] std::uint64_t end_of(HostOffset at, std::uint64_t length) const {
        return (at.value + length + low_bits(cluster_bits_)) >> cluster_bits_;
    }
    static std::uint64_t hash(std::uint64_t key) { return key * 0x9e3779b97f4a7c15 >> 44; }
    void put_in_filter(std::uint64_t key);
    [[nodiscard]] bool in_filter(std::uint64_t key) const;
    [[nodiscard]] Runs::const_iterator first_in(std::uint64_t first, std::uint64_t end) const;

    unsigned cluster_bits_;
    std::vector<std::atomic<std::uint64_t>> filter_;  // a bit for each hash of a cluster, or chunk, ever added
    mutable std::mutex mutex_;
    Runs runs_;
};

}  // namespace qcow::qcow2
