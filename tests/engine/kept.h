#pragma once
// What no work on a disk may change.

#include <map>
#include <optional>
#include <string>

#include "support/memory_files.h"

namespace qcow::test {

struct Kept {
    std::optional<Bytes> snapshot;       ///< what the internal snapshot "first" holds
    std::map<std::string, Bytes> files;  ///< those below

    /// What became of it.
    [[nodiscard]] std::optional<std::string> harm(Image& image, const Files& now) const {
        for (const auto& [name, bytes] : files) {
            if (contents_of(*now.at(name)) != bytes) return "\"" + name + "\", which lies below, has changed";
        }
        if (!snapshot) return std::nullopt;
        const auto disk = image.snapshot("first");
        if (!disk) return "the snapshot cannot be opened: " + disk.error().message();
        Bytes bytes((*disk)->size());
        if (const auto read = (*disk)->read({0}, bytes); !read)
            return "the snapshot cannot be read: " + read.error().message();
        if (bytes != *snapshot) return "the snapshot has changed";
        return std::nullopt;
    }
};

}  // namespace qcow::test
