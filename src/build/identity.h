#pragma once
// UUIDs that follow from what is built, so that the same specification gives the same ones.

#include <cstdint>
#include <string>
#include <string_view>

#include "build/tree.h"
#include "qcow/build.h"

namespace qcow {

/// A UUID (version 8, RFC 9562) that is a hash of `seed` and `purpose`.
Uuid derived_uuid(std::string_view seed, std::string_view purpose);

/// A hash of what trees hold: names, types, owners, times, sizes, links and attributes, but not contents.
class FilesHash {
public:
    void add(std::string_view text);
    void add(std::uint64_t number);
    void add(const TreeInode& inode, bool is_root);
    [[nodiscard]] std::uint64_t value() const { return state_; }

private:
    std::uint64_t state_ = 0;
};

/// The seed of a specification: its own, or one that follows from its partitions, types, names and labels. The latter
/// needs a FilesHash behind it.
std::string seed_of(const BuildSpec& spec);

}  // namespace qcow
