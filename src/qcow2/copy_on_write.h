#pragma once
// The guest's writes: in place where a cluster is the image's alone, into a fresh cluster everywhere else.

#include <cstdint>
#include <span>

#include "qcow2/active_mapping.h"

namespace qcow::qcow2 {

/// A write to clusters that are the image's alone changes no metadata and takes no lock. Every other write holds its
/// guest clusters, takes places for them, writes data around and with what the guest gave, so that each cluster is
/// written once, and then changes the entries.
///
/// Thread safety: all functions may be called from any number of threads. Callers hold an Epochs::Guard where they
/// read.
class CopyOnWrite {
public:
    using L2Entry = format::L2Entry;

    /// All outlive it. `view` reads the active mapping.
    CopyOnWrite(WritableMetadata& metadata, ImageParts& parts, const View& view, ActiveMapping& mapping)
        : metadata_(metadata), parts_(parts), view_(view), mapping_(mapping), rules_(mapping.rules()) {}

    /// Writes guest bytes. The range was verified. Errors: Errc::no_space, io, corrupt.
    Result<void> write(GuestOffset at, ConstBuffers from);

    /// Whether [at, end) reads as zeros for certain, without a look at data. `entries` are those of the clusters from
    /// `first` on, which the range lies in. What lies past the end of the disk is zeros.
    [[nodiscard]] Result<bool> reads_as_zeros(GuestOffset at, GuestOffset end, std::uint64_t first,
                                              std::span<const L2Entry> entries) const;

    /// Whether the backing file has nothing but zeros in [at, end), or there is none.
    [[nodiscard]] Result<bool> backing_is_zeros(GuestOffset at, GuestOffset end) const;

private:
    /// Clusters that are changed together: their entries as they are, and the part of the request that goes there.
    struct Part {
        std::uint64_t first = 0;
        std::span<const L2Entry> old;
        GuestOffset at;
        ConstBuffers from;
        [[nodiscard]] GuestOffset end() const { return at + from.size(); }
    };

    Result<std::size_t> write_in_place(const Mapped& mapped, GuestOffset at, ConstBuffers from);
    Result<std::size_t> write_and_map(GuestOffset at, ConstBuffers from);
    Result<std::size_t> write_into_new(Part part);
    Result<std::size_t> write_into_own(Part part);
    Result<void> write_filled(const Part& part, HostOffset host, GuestOffset begin, GuestOffset end);
    Result<void> read_old(const Part& part, GuestOffset at, Buffers to) const;
    [[nodiscard]] std::vector<L2Entry> new_entries(const Part& part, ClusterRun run) const;

    WritableMetadata& metadata_;
    ImageParts& parts_;
    const View& view_;
    ActiveMapping& mapping_;
    const format::EntryRules& rules_;
};

}  // namespace qcow::qcow2
