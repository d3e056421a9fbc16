#pragma once
// The part of a walk that reads L2 tables.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/walker.h"

namespace qcow::qcow2 {

/// Collects the L2 tables that L1 tables lead to, and visits what these lead to, each table once and in the order of
/// the file, on several threads.
class L2Walk {
public:
    L2Walk(const Metadata& metadata, std::uint64_t file_bytes, const WalkOptions& options, Visitor& visitor);

    /// A table that lies in the file, and the entry that leads to it. Errc::limit_exceeded: the list gets too long.
    Result<void> add(HostOffset table, std::uint64_t l1_index, bool active);

    /// Visits all, once they are known. `data_file_bytes`: the length of the external data file; nothing: it is not
    /// looked at.
    Result<MappedClusters> visit(std::optional<std::uint64_t> data_file_bytes);

private:
    /// An L2 table and who refers to it.
    struct Table {
        HostOffset at;
        std::uint64_t l1_index = 0;
        std::uint64_t count = 1;
        bool active = false;  // from the active L1 table
    };

    void merge_shared_tables();
    Result<void> visit_table(const Table& table, std::span<std::byte> buffer, MappedClusters& mapped);
    Result<void> visit_entries(const Table& table, std::uint64_t index, std::uint64_t count, format::L2Entry entry,
                               HostOffset& contiguous, MappedClusters& mapped);
    Result<void> report_entry(const Place& place, format::L2Entry entry, const format::EntryFlaw& found,
                              std::uint64_t count);
    Result<void> visit_data(const Table& table, const Place& place, format::L2Entry entry, std::uint64_t count);
    Result<void> visit_compressed(const Table& table, const Place& place, format::L2Entry entry);
    Result<void> verify_in_data_file(const Place& place, format::L2Entry entry, std::uint64_t count);

    const Metadata& metadata_;
    const format::Geometry& geometry_;
    const format::EntryRules& rules_;
    const WalkOptions& options_;
    Visitor& visitor_;
    const std::uint64_t file_size_;
    const std::uint64_t file_clusters_;
    const std::uint64_t disk_size_;

    std::vector<Table> tables_;
    std::optional<std::uint64_t> data_file_size_;
};

}  // namespace qcow::qcow2
