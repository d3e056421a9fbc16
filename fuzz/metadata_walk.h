#pragma once
// Where the metadata of a qcow2 file lie, told from its bytes alone: from the format's description, and with none of
// the engine's code, which it is held against.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/storage.h"

namespace qcow::fuzz {

struct Metadata {
    unsigned cluster_bits = 0;  ///< 0: not qcow2
    /// What each host cluster holds. Of huge tables only the first part.
    std::map<std::uint64_t, std::string_view> clusters;
    /// What nothing but a change of the snapshots may change: their table, and their L1 tables.
    std::vector<std::byte> snapshots;

    [[nodiscard]] const std::string_view* find(std::uint64_t host) const {
        const auto found = clusters.find(host >> cluster_bits);
        return found == clusters.end() ? nullptr : &found->second;
    }
};

/// The header's own cluster, the tables that it leads to, the L2 tables of the active state and the bits of bitmaps.
/// Not the L2 tables of snapshots: an entry that is marked as COPIED is believed.
Metadata metadata_of(const Storage& file);

}  // namespace qcow::fuzz
