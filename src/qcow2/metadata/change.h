#pragma once
// The unit of work on an image's metadata.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "qcow2/metadata/writable_metadata.h"

namespace qcow::qcow2 {

/// What a page of tables has to wait for before it is written.
enum class Barrier : bool {
    none,
    flush,  ///< a flush that begins later: of data that must not be missing where the entries lead
};

/// One change of the metadata. It takes clusters, becomes visible all at once with a commit, and then gives up what it
/// has replaced. Without a commit nothing has changed: the destructor gives back what was taken.
///
/// Clusters that are taken are counted and are zeros, both durably, so that the commit may reach the disk at any time.
/// Clusters that are dropped are free again once the commit is durable and no request can be using them.
///
/// A change belongs to one thread. Two changes at once must not be about the same words.
class Change {
public:
    explicit Change(WritableMetadata& metadata) : metadata_(&metadata) {}
    Change(Change&& other) noexcept;
    Change& operator=(Change&& other) noexcept;
    ~Change();

    /// Takes places for the guest clusters from `guest` on: 1 to `wanted` clusters one behind the other. Errors:
    /// Errc::no_space, io, corrupt.
    Result<ClusterRun> take(std::uint64_t guest, std::uint64_t wanted);
    /// Takes room for a compressed stream of `length` bytes, behind the previous stream where it fits. To be committed
    /// behind a flush: a cluster that streams share is not counted durably.
    Result<HostOffset> take_stream(std::uint64_t length);
    /// Takes `clusters` clusters one behind the other for metadata of this kind.
    Result<HostOffset> take_table(MetadataMap::Kind kind, std::uint64_t clusters = 1);

    /// What these hold is referred to no more once the change is committed.
    void drop(ClusterRun run);
    void drop_stream(const format::CompressedRange& range);
    void drop_table(HostOffset at, std::uint64_t bytes);

    // Each is the last thing that a change does. After an error nothing is visible.

    /// Stores words of a table, which lie in one page of the cache: all at once. Errors: Errc::no_space, io.
    Result<void> commit(HostOffset at, std::span<const std::uint64_t> words, Barrier barrier);
    /// Changes the header, durably. What it refers to is durable already.
    Result<void> commit_header(const std::function<void(format::HeaderState&)>& change);
    /// Says that the caller has written what refers to the clusters.
    void commit();

private:
    struct Part {
        ClusterRun run;
        bool table = false;
    };

    void give_up(const std::vector<Part>& parts);
    [[nodiscard]] ClusterRun clusters_of(HostOffset at, std::uint64_t bytes) const;

    WritableMetadata* metadata_;
    std::vector<Part> taken_;
    std::vector<Part> dropped_;
};

/// Stores the pages of a table at `at`, where a page begins, whose words are not what they were: each at once, none
/// behind a flush. They take and drop no clusters. Errors: Errc::no_space, io; some pages are stored then.
Result<void> store_table(WritableMetadata& metadata, HostOffset at, std::span<const std::uint64_t> old,
                         std::span<const std::uint64_t> words);

}  // namespace qcow::qcow2
