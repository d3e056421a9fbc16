#pragma once
// Making new images: empty, or with the contents of a Disk.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow/copy.h"
#include "qcow/image.h"

namespace qcow {

/// What a new image has before it is written to.
enum class Preallocation : std::uint8_t {
    off,       ///< nothing
    metadata,  ///< the whole mapping; data clusters are holes in the file
    falloc,    ///< the mapping, and reserved space for the data
    full,      ///< the mapping, and data clusters filled with zeros
};

/// How a new image is encrypted: with LUKS1. The defaults are QEMU's.
struct EncryptionOptions {
    /// The passphrase of the first key slot. Required, and not empty.
    std::shared_ptr<const Secret> key = {};
    std::string cipher = "aes-256";     ///< aes-128, aes-192, aes-256, serpent-..., twofish-..., cast5-128
    std::string cipher_mode = "xts";    ///< xts, cbc or ecb
    std::string ivgen = "plain64";      ///< plain, plain64 or essiv
    std::string ivgen_hash = {};        ///< for essiv; empty: sha256
    std::string hash = "sha256";        ///< of the key derivation: sha1, sha224, sha256, sha384, sha512, ripemd160
    std::uint32_t iter_time_ms = 2000;  ///< how long deriving the key takes on this processor, in milliseconds; not 0

    friend bool operator==(const EncryptionOptions&, const EncryptionOptions&) = default;
};

/// The properties of a new image. The defaults are QEMU's.
struct CreateOptions {
    std::uint64_t size = 0;                                ///< virtual size in bytes; rounded up by rounded_size()
    unsigned version = 3;                                  ///< 2 or 3
    std::uint64_t cluster_size = std::uint64_t{64} << 10;  ///< a power of two from 512 bytes to 2 MiB
    unsigned refcount_bits = 16;                           ///< a power of two from 1 to 64; 16 in version 2
    bool lazy_refcounts = false;                           ///< lets other programs write refcounts late
    bool extended_l2 = false;                              ///< subclusters; needs clusters of 16 KiB or more
    Compression compression = Compression::zlib;
    Preallocation preallocation = Preallocation::off;
    std::string backing_name = {};    ///< as recorded in the header; empty: no backing file
    std::string backing_format = {};  ///< "raw", "qcow" or "qcow2"; empty: not recorded
    std::string data_file_name = {};  ///< as recorded in the header; empty: no data file
    /// The data file is a raw image by itself. The whole disk is mapped to it, so image and data file always agree.
    bool data_file_raw = false;
    /// Excludes compression and raw data files. For Format::luks, it is required.
    std::optional<EncryptionOptions> encryption = {};

    friend bool operator==(const CreateOptions&, const CreateOptions&) = default;
};

/// The files of a new image. Their contents are lost. A block device is written from its start and need not read as
/// zeros; if it is too small, the result is Errc::no_space.
struct NewImageFiles {
    std::shared_ptr<Storage> image;
    std::shared_ptr<Storage> data_file;  ///< null if CreateOptions::data_file_name is empty
};

/// Makes an empty qcow2 image. Errors: Errc::invalid_argument for options that exclude each other; Errc::limit_exceeded
/// for names that do not fit into the header; Errc::io, no_space.
QCOW_API Result<void> create_image(const NewImageFiles& files, const CreateOptions& options);

/// Makes a raw disk of zeros in `file`: see NewImageFiles. The only options are `size` and `preallocation`, except
/// Preallocation::metadata. Errors: Errc::invalid_argument for others; Errc::io, no_space.
QCOW_API Result<void> create_raw_image(const std::shared_ptr<Storage>& file, const CreateOptions& options);

/// Makes an encrypted disk in `file`: see NewImageFiles. The options are `size`, `encryption` and `preallocation`,
/// except Preallocation::metadata. With Preallocation::full the disk reads as zeros; else it may read as anything,
/// since no zeros are encrypted. Errors: as for create_raw_image.
QCOW_API Result<void> create_luks_image(const std::shared_ptr<Storage>& file, const CreateOptions& options);

/// Describes a new image and its name. Plain data.
struct NewImage {
    std::string path = {};          ///< the file to make or replace, or the block device to overwrite
    Format format = Format::qcow2;  ///< raw, qcow2 or luks
    /// The names of the backing file and the data file are parsed by parse_location, relative to the directory of
    /// `path`, and recorded as recorded_name() returns them. The format of the backing file is required, in
    /// `backing_format` or in its name. The data file must be absent, empty or a block device.
    CreateOptions options = {};
    bool untrusted = false;  ///< the backing file is not trusted: see ImageSpec::untrusted
    KeySource keys = {};     ///< of the layers of the backing file: see OpenOptions::keys
    /// Called once all that the job reads is open, before it writes anything. An error ends the job. Empty: nothing.
    std::function<Result<void>()> verify = {};
    NewFile::Contents contents = NewFile::Contents::durable;
};

struct CreateJob {
    NewImage image;
    /// Takes the size of the backing file in place of CreateOptions::size.
    bool size_of_backing = false;
    bool unchecked = false;  ///< does not open the backing file; excludes size_of_backing
};

struct CreateResult {
    std::string path;
    std::uint64_t size = 0;         ///< virtual size in bytes
    std::vector<Warning> warnings;  ///< all warnings that JobControl::warn received
};

/// Makes an empty image and its data file. They get their names when they are complete: see NewFile. Opens the backing
/// file first, to verify that it is an image. Never overwrites the backing file or a file of its chain.
///
/// Uses only `warn` of `control`.
/// Errors: Errc::invalid_argument for options that exclude each other; those of open_image and NewFile.
QCOW_API Result<CreateResult> create(const CreateJob& job, const JobControl& control = {});

struct ConvertOptions {
    /// target_is_zero and skip_equal are ignored. sparse_bytes: 0 stores clusters of zeros, other values do not.
    CopyOptions copy = {};
    bool compress = false;  ///< excludes preallocation
    /// 1 (fast) to 9 (small) for zlib, 1 to 19 for zstd. If unset, 2 for zlib and 3 for zstd. ISA-L does zlib's levels
    /// 1 to 3.
    std::optional<int> level = {};
    /// The disk of the backing file that CreateOptions::backing_name names. Clusters equal to it are not stored.
    std::shared_ptr<Disk> backing = {};
};

/// Makes a qcow2 image with the contents of `source`. CreateOptions::size 0 stands for the source's size. A larger size
/// adds zeros. The same source and options give the same bytes, for any number of workers. Memory does not grow with
/// the image.
///
/// Errors: Errc::invalid_argument for a size smaller than the source's, and for options that exclude each other;
/// Errc::cancelled; those of reading and writing.
QCOW_API Result<void> convert_image(Disk& source, const NewImageFiles& files, const CreateOptions& options,
                                    const ConvertOptions& convert = {});

/// Makes a raw disk with the contents of `source`: see create_raw_image and convert_image. Set
/// CopyOptions::target_is_zero if `file` is empty or reads as zeros.
QCOW_API Result<void> convert_raw_image(Disk& source, const std::shared_ptr<Storage>& file,
                                        const CreateOptions& options, const CopyOptions& copy = {});

/// Makes an encrypted disk with the contents of `source`: see create_luks_image and convert_image.
QCOW_API Result<void> convert_luks_image(Disk& source, const std::shared_ptr<Storage>& file,
                                         const CreateOptions& options, const CopyOptions& copy = {});

}  // namespace qcow
