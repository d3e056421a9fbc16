#pragma once
// Host clusters that are reserved, and for which guest clusters: what decides where data lie in the file.

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/metadata/refcounts.h"

namespace qcow::qcow2 {

/// Guest clusters one behind the other, by number.
struct GuestRun {
    std::uint64_t first = 0;
    std::uint64_t count = 0;
    [[nodiscard]] std::uint64_t end() const { return first + count; }
};

/// The reservations for guest data. Each is a window: guest clusters, and as many host clusters, in the same order. A
/// write takes the host clusters that its window has for it, so that what a guest writes front to back lies front to
/// back in the file, in whatever order its requests arrive.
///
/// A window that follows another one is larger, as long as the guest goes on there. (The reservation windows of ext3,
/// with a fixed place for each guest cluster.)
///
/// Pure bookkeeping, no I/O. Not thread-safe.
class Reservations {
public:
    /// `most`: clusters that one window may have, beyond those that a request needs at once.
    explicit Reservations(std::uint64_t most) : most_(most) {}

    /// The host clusters reserved for the guest clusters from `guest` on, 1 to `wanted`, if there are any.
    std::optional<ClusterRun> take_for(std::uint64_t guest, std::uint64_t wanted);

    /// `wanted` host clusters that are reserved for nothing, for the guest clusters from `guest` on, which have no
    /// place. Returns nothing if there are not as many in one run.
    std::optional<ClusterRun> take_spare(std::uint64_t guest, std::uint64_t wanted);

    /// One host cluster that is reserved for something else: the last of a window that was not used for long.
    std::optional<ClusterRun> take_any();

    /// For which guest clusters of a disk of `disk` clusters to reserve, where `guest` has no place: it is one of them.
    /// Returns nothing if no window is near, or if much is reserved already: spare clusters do as well.
    [[nodiscard]] std::optional<GuestRun> next_window(std::uint64_t guest, std::uint64_t wanted,
                                                      std::uint64_t disk) const;

    /// These host clusters have been reserved, which may be scattered: the first of them for `guest`, as far as those
    /// have no window yet; the others are spare.
    void add(GuestRun guest, std::span<const ClusterRun> runs);

    /// All that is left, in the order of the file. Nothing is reserved any more.
    std::vector<ClusterRun> take_all();

private:
    struct Window {
        std::uint64_t host = 0;        // of the first guest cluster
        std::uint64_t count = 0;       // of guest clusters
        std::vector<ClusterRun> free;  // host clusters, in their order
        std::uint64_t used = 0;        // when
    };
    using Windows = std::map<std::uint64_t, Window>;  // by their first guest clusters; they do not overlap

    std::uint64_t open_window(GuestRun guest, std::uint64_t host, bool free);
    void drop_oldest();

    std::uint64_t most_;
    std::uint64_t taken_ = 0;  // clusters, in all
    std::uint64_t free_ = 0;   // clusters, in windows
    std::uint64_t now_ = 0;
    Windows windows_;
    std::vector<ClusterRun> spare_;  // reserved for nothing
};

}  // namespace qcow::qcow2
