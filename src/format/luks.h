#pragma once
// What a LUKS1 header tells without a key. Source: the LUKS1 on-disk format specification, version 1.2.3, section 2.

#include <cstddef>
#include <span>

#include "qcow/error.h"
#include "qcow/image.h"

namespace qcow::format {

inline constexpr std::size_t luks1_header_bytes = 592;

Result<EncryptionInfo> parse_luks1(std::span<const std::byte> header);

}  // namespace qcow::format
