#pragma once
// The parts of a new image in memory, open for writing.

#include <memory>

#include "qcow/create.h"
#include "qcow2/active_mapping.h"
#include "support/bytes.h"
#include "support/counting_storage.h"
#include "support/result.h"

namespace qcow::test {

struct OpenParts {
    explicit OpenParts(CreateOptions options = {.size = std::uint64_t{1} << 20, .cluster_size = 4096},
                       std::shared_ptr<Storage> external = nullptr)
        : file(std::make_shared<CountingStorage>(memory_storage())) {
        must(create_image({file, external}, options));
        Bytes cluster(options.cluster_size);
        must(file->read({0}, cluster));
        parts = std::make_shared<qcow2::ImageParts>(must(format::parse_header(cluster)), file, external, nullptr, "",
                                                    std::size_t{1} << 20);
        view = std::make_unique<qcow2::View>(parts);
        metadata = std::make_unique<qcow2::WritableMetadata>(parts->metadata, parts->data.to_flush(), WriteOptions{});
        must(metadata->load());
        mapping = std::make_unique<qcow2::ActiveMapping>(*metadata, view->mapping());
    }

    std::shared_ptr<CountingStorage> file;
    std::shared_ptr<qcow2::ImageParts> parts;
    std::unique_ptr<qcow2::View> view;
    std::unique_ptr<qcow2::WritableMetadata> metadata;
    std::unique_ptr<qcow2::ActiveMapping> mapping;
};

}  // namespace qcow::test
