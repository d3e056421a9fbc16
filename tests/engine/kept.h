#pragma once
// What no work on a disk may change.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "support/guest.h"
#include "support/memory_files.h"

namespace qcow::test {

struct Kept {
    std::optional<Bytes> snapshot;       ///< what the internal snapshot "first" holds
    std::map<std::string, Bytes> files;  ///< those below
    std::vector<Guest::Snapshot> made;   ///< other snapshots

    /// The same after a power loss: any of the snapshots may be there.
    [[nodiscard]] Kept at_any_time() const {
        auto result = *this;
        for (auto& known : result.made) known.made = known.gone = Guest::Snapshot::never;
        return result;
    }

    /// What became of it, by `tick`.
    [[nodiscard]] std::optional<std::string> harm(Image& image, const Files& now, Tick tick) const {
        for (const auto& [name, bytes] : files) {
            if (contents_of(*now.at(name)) != bytes) return "\"" + name + "\", which lies below, has changed";
        }
        for (const auto& known : made) {
            auto disk = image.snapshots().open(known.name);
            if (!disk) disk = image.snapshots().open(known.other_name);
            if (!disk) {
                if (tick < known.made || tick >= known.removing) continue;
                return known.name + " was made, and cannot be opened: " + disk.error().message();
            }
            if (tick > known.gone) return known.name + " was removed, and is there";
            Bytes bytes((*disk)->size());
            if (const auto read = (*disk)->read({0}, bytes); !read)
                return known.name + " cannot be read: " + read.error().message();
            if (bytes != known.contents) return known.name + " does not hold what the disk held when it was made";
        }
        if (!snapshot) return std::nullopt;
        const auto disk = image.snapshots().open("first");
        if (!disk) return "the snapshot cannot be opened: " + disk.error().message();
        Bytes bytes((*disk)->size());
        if (const auto read = (*disk)->read({0}, bytes); !read)
            return "the snapshot cannot be read: " + read.error().message();
        if (bytes != *snapshot) return "the snapshot has changed";
        return std::nullopt;
    }
};

}  // namespace qcow::test
