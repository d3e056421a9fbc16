#pragma once
// The metadata of an image, as JSON and as text.

#include "command.h"
#include "qcow/copy.h"
#include "qcow/filesystem.h"

namespace tool {

/// Returns a message for each part of the metadata that could not be read.
std::vector<std::string> warnings_of(const qcow::ImageInfo& info);

Json info_json(const qcow::ImageInfo& info);
Json snapshots_json(const qcow::ImageInfo& info);
Json usage_json(const qcow::Usage& usage, std::uint64_t cluster_size);

void print_info(const qcow::ImageInfo& info);
/// A line for each partition.
void print_contents(const qcow::PartitionTable& table);
void print_snapshots(const qcow::ImageInfo& info);
void print_usage(const qcow::Usage& usage, std::uint64_t cluster_size);

}  // namespace tool
