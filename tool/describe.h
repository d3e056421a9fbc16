#pragma once
// What an image's metadata say, as JSON and as text.

#include "command.h"
#include "qcow/copy.h"

namespace tool {

/// What could not be read of what the metadata say.
std::vector<std::string> warnings_of(const qcow::ImageInfo& info);

Json info_json(const qcow::ImageInfo& info);
Json snapshots_json(const qcow::ImageInfo& info);
Json usage_json(const qcow::Usage& usage, std::uint64_t cluster_size);

void print_info(const qcow::ImageInfo& info);
void print_snapshots(const qcow::ImageInfo& info);
void print_usage(const qcow::Usage& usage, std::uint64_t cluster_size);

}  // namespace tool
