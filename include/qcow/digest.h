#pragma once
// Digests of what a guest sees: the same for the same contents, however they are stored.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qcow/disk.h"
#include "qcow/image_spec.h"

namespace qcow {

struct DigestOptions {
    std::string algorithm = "sha256";  ///< a hash function of OpenSSL with digests of a fixed length
    unsigned workers = 0;              ///< threads; 0: one a processor
    JobControl control = {};           ///< progress is in guest bytes
};

/// Returns the length of an algorithm's digests in bytes. Errors: Errc::invalid_argument for an algorithm that is not
/// known; Errc::unsupported where the library was built without OpenSSL. Thread-safe.
QCOW_API Result<std::size_t> digest_size(const std::string& algorithm);

/// Computes the digest of a disk's contents, in parallel: the hash of the hashes of its blocks of 64 KiB in order, and
/// of its size. docs/digest.md defines it. It depends on nothing but the contents and the size, which counts whole
/// sectors: a disk that ends within a sector goes on with zeros to the sector's end.
///
/// Holes and zeros are not read. Each block of them costs one hash of a hash: about 0.3 s for 1 TiB with SHA-256 and a
/// processor that has instructions for it. Memory: a piece of 256 KiB or a block for each worker.
///
/// Errors: those of digest_size, Disk::read and Disk::extent; Errc::cancelled. Thread safety: as that of the disk.
QCOW_API Result<std::vector<std::byte>> digest_disk(Disk& disk, const DigestOptions& options = {});

/// What a digest is computed of. Plain data.
struct DigestJob {
    ImageSpec image;
    std::string snapshot = {};  ///< id or name of an internal snapshot; empty: the active state
};

struct DigestResult {
    Format format = Format::raw;
    std::uint64_t size = 0;  ///< of the disk, in bytes
    std::vector<std::byte> digest;
};

/// Opens an image and computes the digest of its contents. Nothing is written. Errors: those of open_image,
/// Image::snapshot and digest_disk.
QCOW_API Result<DigestResult> digest(const DigestJob& job, const DigestOptions& options = {});

}  // namespace qcow
