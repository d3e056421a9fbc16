#pragma once
// What an open qcow2 image consists of.

#include "disk/backing_file.h"
#include "qcow2/data_file.h"
#include "qcow2/metadata/metadata.h"
#include "qcow2/open_snapshots.h"

namespace qcow::qcow2 {

/// An image and its snapshots share these, and keep them open.
struct ImageParts {
    ImageParts(const format::Header& header, std::shared_ptr<Storage> file,
               const std::shared_ptr<Storage>& external_data, std::shared_ptr<Layer> backing_image,
               std::string backing_name, std::size_t cache_bytes,
               std::shared_ptr<const crypto::SectorCipher> cipher = nullptr)
        : metadata(header, std::move(file), cache_bytes),
          data(metadata, external_data, std::move(cipher)),
          backing(std::move(backing_image), std::move(backing_name)) {}

    Metadata metadata;
    DataFile data;
    BackingFile backing;
    OpenSnapshots open_snapshots;
};

}  // namespace qcow::qcow2
