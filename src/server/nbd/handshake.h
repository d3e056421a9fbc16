#pragma once
// The first part of a connection: client and server agree on an export and on the form of requests.

#include <optional>
#include <span>

#include "server/nbd/input.h"
#include "server/nbd/session.h"

namespace qcow::nbd {

/// Negotiates until the client chooses an export. Nothing: it left, or does not speak the protocol. Every export has
/// its built-in contexts among its contexts here, and there is at least one.
std::optional<Session> shake_hands(Stream& stream, Input& input, std::span<const NbdExport> exports);

/// The flags that a client is told about an export.
std::uint16_t transmission_flags(const NbdExport& exported, Style style);

}  // namespace qcow::nbd
