#pragma once
// Making new images: empty ones, and ones with the contents of a Disk.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow/copy.h"
#include "qcow/image.h"

namespace qcow {

/// Whether host clusters are there before they are written.
enum class Preallocation : std::uint8_t {
    off,
    metadata,  ///< all of the mapping; data clusters are holes in the file
    falloc,    ///< and their space is reserved
    full,      ///< and filled with zeros
};

/// What a new image is to be like. The defaults are QEMU's.
struct CreateOptions {
    std::uint64_t size = 0;                                ///< virtual size in bytes; rounded_size() of it is made
    unsigned version = 3;                                  ///< 2 or 3
    std::uint64_t cluster_size = std::uint64_t{64} << 10;  ///< 512 bytes to 2 MiB, a power of two
    unsigned refcount_bits = 16;                           ///< 1 to 64, a power of two; 16 in version 2
    bool lazy_refcounts = false;
    bool extended_l2 = false;  ///< subclusters; clusters of at least 16 KiB
    Compression compression = Compression::zlib;
    Preallocation preallocation = Preallocation::off;
    std::string backing_name = {};    ///< as it is to stand in the header; empty: no backing file
    std::string backing_format = {};  ///< "raw", "qcow" or "qcow2"
    std::string data_file_name = {};  ///< as it is to stand in the header; empty: data lie in the image
    /// The data file is to be a raw image by itself: all of the disk is mapped to it, so that both are always the same.
    bool data_file_raw = false;

    friend bool operator==(const CreateOptions&, const CreateOptions&) = default;
};

/// The files that a new image consists of. What they hold is lost. Block devices are written from their start, and need
/// not read as zeros; Errc::no_space where they are too small.
struct NewImageFiles {
    std::shared_ptr<Storage> image;
    std::shared_ptr<Storage> data_file;  ///< null unless CreateOptions::data_file_name is set
};

/// Makes an image without contents. Errc::invalid_argument for options that exclude each other, with the reason.
QCOW_API Result<void> create_image(const NewImageFiles& files, const CreateOptions& options);

/// Makes a raw disk of zeros. Of the options it has `size` and `preallocation`, but not that of metadata:
/// Errc::invalid_argument for others. See NewImageFiles for `file`.
QCOW_API Result<void> create_raw_image(const std::shared_ptr<Storage>& file, const CreateOptions& options);

/// A new image under a name. Plain data.
struct NewImage {
    std::string path = {};          ///< a file to make or to replace, or a block device to overwrite
    Format format = Format::qcow2;  ///< raw or qcow2
    /// The names of backing file and data file are names that a person gives: see parse_location. They are relative to
    /// the directory of `path`, and the image records them as recorded_name() says. A backing file needs its format, in
    /// `backing_format` or in its name. A data file must be new or empty, or a block device.
    CreateOptions options = {};
    bool untrusted = false;  ///< the backing file comes from a stranger: see ImageSpec::untrusted
    NewFile::Contents contents = NewFile::Contents::durable;
};

struct CreateJob {
    NewImage image;
    /// The size is that of the backing file, whatever CreateOptions::size says. Otherwise it is that.
    bool size_of_backing = false;
    bool unchecked = false;  ///< the backing file need not be there; excludes size_of_backing
};

struct CreateResult {
    std::string path;
    std::uint64_t size = 0;         ///< of the disk, in bytes
    std::vector<Warning> warnings;  ///< all that JobControl::warn was told
};

/// Makes an empty image and its data file, which appear under their names when they are complete: see NewFile. Opens
/// the backing file first, to see that it is an image. Never overwrites the backing file or what lies below it.
/// Errors: Errc::invalid_argument for options that exclude each other; those of open_image and NewFile.
/// Of `control` only `warn` matters.
QCOW_API Result<CreateResult> create(const CreateJob& job, const JobControl& control = {});

struct ConvertOptions {
    /// target_is_zero and skip_equal do not matter. Of sparse_bytes only 0 does: whole clusters of zeros are stored.
    CopyOptions copy = {};
    bool compress = false;  ///< excludes preallocation
    /// 1 (fast) to 9 (small) for zlib, 1 to 19 for zstd; nothing: 2 and 3. Levels 1 to 3 of zlib are ISA-L's.
    std::optional<int> level = {};
    /// The contents of the backing file that `CreateOptions::backing_name` names: what is equal to it is not stored.
    std::shared_ptr<Disk> backing = {};
};

/// Makes an image with the contents of `source`, and zeros behind them if the options give a larger size. Size 0 is
/// that of the source; Errc::invalid_argument for one that is smaller. The same source and options give the same bytes,
/// whatever the number of workers. Memory does not grow with the image.
QCOW_API Result<void> convert_image(Disk& source, const NewImageFiles& files, const CreateOptions& options,
                                    const ConvertOptions& convert = {});

/// The same for a raw disk, see create_raw_image. CopyOptions::target_is_zero: whether `file` is empty, or reads as
/// zeros.
QCOW_API Result<void> convert_raw_image(Disk& source, const std::shared_ptr<Storage>& file,
                                        const CreateOptions& options, const CopyOptions& copy = {});

}  // namespace qcow
