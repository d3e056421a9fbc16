#pragma once
// The host clusters that a repair adds to an image.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "qcow2/image_check.h"

namespace qcow::qcow2 {

/// Where the clusters of a repair may lie.
struct Room {
    /// Free clusters of the file are used first. Otherwise all new clusters lie behind its end.
    bool inside = false;
    bool fixed_size = false;             ///< the file is a block device, which cannot grow
    std::set<std::uint64_t> taken = {};  ///< clusters that are in use, although the diagnosis has no reference to them
};

/// Hands out host clusters, and counts the references that they will have.
///
/// A cluster in the file is free if the diagnosis has no reference to it and its refcount is 0. If the refcount is
/// unknown, damage must not hide references. A leaked cluster may hold lost data, so it is used only if the file cannot
/// grow.
class NewClusters {
public:
    /// `metadata` and `diagnosis` outlive it.
    NewClusters(const Metadata& metadata, const Diagnosis& diagnosis, Room room);

    /// Returns `count` clusters, one behind the other, without references. Errors: Errc::no_space; io.
    Result<HostOffset> allocate(std::uint64_t count);
    /// Adds `count` references to clusters that allocate() returned.
    void refer(HostOffset at, std::uint64_t clusters, std::uint64_t count);

    /// Whether room is left for copies that the repair could do without.
    [[nodiscard]] bool has_spare_room() const { return !room_.fixed_size || inside_.size() < free_inside_ / 2; }

    /// The first cluster behind the file.
    [[nodiscard]] std::uint64_t first() const { return first_; }
    [[nodiscard]] std::uint64_t end() const { return first_ + counts_.size(); }
    /// The references of a cluster; 0 for a cluster that is not new.
    [[nodiscard]] std::uint64_t count(std::uint64_t cluster) const;
    /// Whether one of the clusters from `first` to `end` - 1 is new.
    [[nodiscard]] bool any(std::uint64_t first, std::uint64_t end) const;

private:
    Result<std::optional<std::uint64_t>> find_inside(std::uint64_t count);
    Result<bool> is_free(std::uint64_t cluster);
    Result<std::optional<std::uint64_t>> refcount_of(std::uint64_t cluster);

    const Metadata& metadata_;
    const Diagnosis& diagnosis_;
    const Room room_;
    const unsigned cluster_bits_;
    const std::uint64_t per_block_;
    std::uint64_t inside_end_;                       // complete clusters of the file
    std::uint64_t free_inside_ = 0;                  // if the file cannot grow: clusters without a reference
    std::uint64_t search_from_ = 1;                  // no single free cluster lies before it
    std::map<std::uint64_t, std::uint64_t> inside_;  // references by cluster
    std::uint64_t first_;
    std::vector<std::uint64_t> counts_;  // references of the clusters from first_ on
    std::size_t block_index_ = SIZE_MAX;
    std::vector<std::byte> block_;  // the refcount block of this index
};

}  // namespace qcow::qcow2
