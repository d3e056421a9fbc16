#pragma once
// The kinds of images that can be written, each with some contents to begin with.

#include <fmt/format.h>

#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "base/endian.h"
#include "crypto/cipher.h"
#include "engine/kept.h"
#include "format/header.h"
#include "qcow/create.h"
#include "support/memory_files.h"
#include "support/model.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/temporary_directory.h"

namespace qcow::test {

struct ImageKind {
    enum class Contents : std::uint8_t { none, plain, compressed };

    /// The layer below.
    struct Below {
        Format format = Format::qcow2;
        bool longer = false;  // than the image, else shorter
        bool compressed = false;
    };

    std::string name;
    CreateOptions create = {};
    Contents contents = Contents::none;
    std::optional<Below> below = {};
    bool snapshot = false;  // internal, of the first contents
    bool dirty = false;     // the refcounts are wrong, and the image says so
    OpenOptions open = {};  // but for what depends on the files

    [[nodiscard]] bool has_snapshots() const { return create.data_file_name.empty(); }
    [[nodiscard]] bool has_bitmaps() const { return create.version == 3; }
    [[nodiscard]] bool encrypted() const { return create.encryption.has_value(); }
    [[nodiscard]] bool can_compress() const { return create.data_file_name.empty() && !encrypted(); }

    /// Version 2 has no clusters of zeros: what is discarded shows what lies below.
    [[nodiscard]] bool discards_read_as_zeros() const { return open.write.discard && (create.version == 3 || !below); }
};

inline void PrintTo(const ImageKind& kind, std::ostream* out) { *out << kind.name; }

/// The first contents of all images: what a sector of the image, or of its backing file, holds where it is not zeros.
inline constexpr Value first_value = 1'000'000'001;
inline constexpr Value value_below = 1'000'000'002;

/// Sectors of this value, with gaps of zeros.
Bytes some_contents(std::uint64_t size, Value value, Random& random);

std::shared_ptr<Image> raw_disk(Bytes bytes);

struct Prepared {
    Files files;
    Bytes contents;  // what the guest sees
    Kept kept = {};
};

/// As a writer leaves an image that keeps refcounts in memory and dies: marked as dirty, some blocks not there, some
/// with anything in them.
void make_dirty(Storage& file, Random& random);

Prepared prepare(const ImageKind& kind, Random& random);

/// Gives secret_of_tests.
Result<Secret> key_of_tests(const KeyRequest& request);

/// Returns the cipher of an image that is encrypted with LUKS and secret_of_tests.
Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const Storage& file);

Result<std::shared_ptr<Image>> open_kind(const ImageKind& kind, const Files& files, bool writable);

/// Commits the image, which is closed, to the layer below.
void commit_kind(const ImageKind& kind, const Files& files);

/// All of them: sizes are small, and odd where that is possible.
std::vector<ImageKind> image_kinds();

}  // namespace qcow::test
