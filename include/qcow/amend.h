#pragma once
// Changing the options of an image that exists: the job.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "qcow/image_spec.h"

namespace qcow {

/// A change of the key slots of LUKS1. The key of the data stays.
struct KeySlotChange {
    /// Set: adds this passphrase, in `slot` or in the first unused slot. It is not empty. ImageSpec::keys is asked for
    /// a passphrase that the image has. Unset: erases.
    std::shared_ptr<const Secret> new_key = {};
    /// What to erase: every slot that this passphrase opens; with `slot`, that one, which it has to open. Excludes
    /// `new_key`. If both are unset, `slot` is erased, even if it is not in use.
    std::shared_ptr<const Secret> old_key = {};
    std::optional<unsigned> slot = {};  ///< 0 to 7
    std::uint32_t iter_time_ms = 2000;  ///< see EncryptionOptions; for `new_key`
    /// Allows to replace a used slot, and to erase the last one: nobody can ever read the data then.
    bool force = false;

    friend bool operator==(const KeySlotChange&, const KeySlotChange&) = default;
};

/// What an image gets. A member that is not set keeps what the image has.
struct AmendOptions {
    std::optional<unsigned> version = {};        ///< 2 or 3
    std::optional<unsigned> refcount_bits = {};  ///< a power of two from 1 to 64; version 2 has 16
    std::optional<bool> lazy_refcounts = {};     ///< see CreateOptions; needs version 3
    std::optional<std::uint64_t> size = {};      ///< of the disk, in bytes; at least the present size
    /// The backing file, as a person names it: a relative path starts at the image's directory. Empty: none. The name
    /// is recorded as by RebaseJob::unsafe: the file need not exist, and if it has other contents, so does the image.
    std::optional<std::string> backing_name = {};
    std::optional<Format> backing_format = {};  ///< required with `backing_name`, unless that is empty or names it
    /// For clusters that are written from now on. The image must not have compressed clusters of the other kind.
    std::optional<Compression> compression = {};
    /// The name of the external data file, as a person gives it, for one that was moved. The image must have such a
    /// file. It must exist.
    std::optional<std::string> data_file_name = {};
    /// false: other programs may no longer read the external data file as a raw image. An image cannot get true.
    std::optional<bool> data_file_raw = {};
    /// Adds or erases a key slot of an image that is encrypted with LUKS1. No other member may be set with it.
    std::optional<KeySlotChange> key_slot = {};

    friend bool operator==(const AmendOptions&, const AmendOptions&) = default;
};

struct AmendJob {
    ImageSpec image;  ///< without ImageSpec::write, the defaults of WriteOptions hold
    AmendOptions options = {};
};

/// Changes the options of a qcow2 image, or the key slots of a LUKS1 image. The contents of its disk stay, except for a
/// larger size and another backing file.
///
/// First the header forgets an erased slot, then its key material is overwritten with random bytes, both durably. Each
/// job overwrites what an interrupted one has left in unused slots. (Copies of the old bytes may remain in snapshots of
/// the file system, and in devices that write elsewhere.)
///
/// The job first verifies that all of the options can be had. Its message names everything that stands in the way. Then
/// it makes the changes one after the other, each durable before the next. It can be cancelled, and the process may
/// die, at any moment: the image is sound, with some of the changes, and the job can be run again.
///
/// Version 2 has no zero clusters. They become holes where no backing file shows through, and zeros in data clusters
/// elsewhere, which takes space. A table of feature names, and features that only version 3 has and that do not matter
/// to readers, are left out.
///
/// Errors, before anything changes: Errc::unsupported: the image is not qcow2, or for key slots neither that nor LUKS1;
/// Errc::invalid_argument: an option cannot be had, or a file would have two roles; Errc::corrupt: the refcounts cannot
/// be counted. Later: Errc::cancelled; those of Image::resize and Disk::write.
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<void> amend(const AmendJob& job, const JobControl& control = {});

}  // namespace qcow
