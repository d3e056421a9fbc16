#pragma once
// The files of a qcow2 image, for jobs on its metadata that do not open the image.

#include <memory>
#include <optional>
#include <string_view>

#include "crypto/cipher.h"
#include "qcow/check.h"
#include "qcow/image_spec.h"
#include "qcow/storage.h"

namespace qcow {

struct MetadataFiles {
    std::shared_ptr<Storage> image;
    std::shared_ptr<Storage> data;  ///< the external data file, for reading; null: there is none
};

/// Opens them. `done` says what the job does, for the message about an image of another format: "repaired". Errors:
/// Errc::unsupported for formats other than qcow2; those of opening files.
Result<MetadataFiles> open_metadata_files(const ImageSpec& spec, bool writable, std::string_view done);

/// Returns the cipher of an encrypted image. ImageSpec::keys is asked for its key. Errors: those of asking and of
/// luks::unlock.
Result<std::shared_ptr<const crypto::SectorCipher>> find_cipher(const ImageSpec& spec, const Storage& image);

/// An image that was opened to be examined.
struct ExaminedImage {
    std::shared_ptr<Image> image;
    std::optional<CheckFinding> broken_chain;  ///< the image was opened without its chain, for this reason
};

/// Opens an image with its backing chain, or without it if only the chain is broken. Errors: those of open_image.
Result<ExaminedImage> open_to_examine(const ImageSpec& spec, const Warn& warn);

/// Puts a broken chain in front of what a check has found.
void add_broken_chain(CheckReport& report, const std::optional<CheckFinding>& broken_chain);

/// Whether the image lies in a block device, whose length does not change.
bool is_device(const ImageSpec& spec);

}  // namespace qcow
